"""More teachers of a testbed: the same task in other words, each with a tokenizer of its own."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from tests.testbeds.test_pair import hurried
from tropd.config.models import ModelConfig
from tropd.laboratory.lab import Lab
from tropd.laboratory.trial import Trial, fingerprint_of, run_of
from tropd.methods import OPD
from tropd.model.loading import load_tokenizer
from tropd.testbeds import TESTBEDS, make_pair
from tropd.testbeds.chain import Chain, ChainStyle
from tropd.testbeds.pairs import Pairs
from tropd.testbeds.tokenizer import make_tokenizer


def test_the_words_of_pairs_are_the_text_of_the_chain_as_its_tokenizer_cuts_it() -> None:
    style = ChainStyle(corrupt=0.3)
    for marks in ("=;", "+-=,;|?"):
        task, plain = Pairs(marks=marks), Chain()
        tokenizer = make_tokenizer(task)
        for seed in range(20):
            problem, known = task.problem(random.Random(seed)), plain.problem(random.Random(seed))
            assert "".join(problem.question) == "".join(known.question) and problem.answer == known.answer
            words = task.write(random.Random(seed), problem, style)
            text = "".join(word for word, _ in words)
            assert text == "".join(word for word, _ in plain.write(random.Random(seed), known, style))
            assert tokenizer.tokenize(text) == [word for word, _ in words]
            parts = iter(plain.write(random.Random(seed), known, style))
            for word, learnt in words:
                assert learnt == all(next(parts)[1] for _ in word)


def test_a_pair_has_its_testbeds_other_teachers_and_a_comparison_names_them(tmp_path: Path) -> None:
    others = {"apart": Chain(), "pairs": Pairs()}
    pair = make_pair(hurried("foreign", others=others), 0, tmp_path / "foreign-0")
    assert list(pair.others) == ["teacher-apart", "teacher-pairs"] and "teacher_pairs_accuracy" in pair.facts
    sizes = [len(load_tokenizer(ModelConfig(path=str(x)), "teacher")) for x in (pair.teacher, *pair.others.values())]
    assert sizes[0] == sizes[1] < sizes[2]
    weights = {(x / "model.safetensors").read_bytes() for x in (pair.teacher, *pair.others.values())}
    assert len(weights) == 3
    runs = {name: {"teacher": {"path": path}} for name, path in (("a", "teacher-apart"), ("b", "teacher-pairs"))}
    lab = Lab(output=str(tmp_path), testbeds=("foreign",), methods={"a": OPD(), "b": OPD(), "c": OPD()}, runs=runs)
    made = [run_of(lab, Trial(testbed="foreign", method=x, learning_rate=1e-3, seed=0), pair) for x in "abc"]
    assert [Path(run.teacher.path) for run in made] == [*pair.others.values(), pair.teacher]
    assert len({fingerprint_of(run) for run in made}) == 3


def test_other_teachers_are_part_of_the_recipe_and_testbeds_without_them_keep_theirs() -> None:
    from tropd.testbeds.pair import _recipe

    bed = TESTBEDS["foreign"]
    assert _recipe(bed) != _recipe(dataclasses.replace(bed, others={}))
    assert "others" not in repr(TESTBEDS["nano-mild"])
