"""How much of each ROI's response a trained model routes through each stream, and what to claim."""
