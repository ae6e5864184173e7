"""How much memory a fine-tuning would take, from its config alone: nothing here runs a real model."""
