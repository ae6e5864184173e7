"""P3, DiT-BlockSkip: fine-tune image DiTs in little memory, by dynamic patches and stored residuals."""
