"""From one tokenizer to another: the same text as the student drew it and as a teacher cuts it."""
