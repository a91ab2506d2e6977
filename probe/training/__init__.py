"""Fine-tuning: its memory, and adapters with their ranks."""
