"""P3, DiT-BlockSkip: fine-tune image DiTs in little memory with dynamic patches and stored residuals of skipped blocks."""
