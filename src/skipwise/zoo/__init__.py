"""Small models that come with the package: their tasks, tokenizer, recipes and weights."""
