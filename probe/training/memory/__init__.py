"""Memory of fine-tuning: tape → memory → gpus → advice, show; tracked follows a real step."""
