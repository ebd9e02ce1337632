"""Everything that only a GPU can tell, in one prepared run: `make gpu-check`.

Made for a bare machine: no network, no pytest, eight minutes.  Parts run in processes of their own with limits of their
own, the most important first, and results are written anew after each: a run that is cut off still tells something.
"""
