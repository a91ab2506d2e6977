"""Memory of fine-tuning: tape and counter → estimate → gpus → advice, show; tracker follows a real step."""
