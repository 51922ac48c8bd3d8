"""Fine-tuning: adapters trained beside the frozen weights of a built transformer. `python -m mmdit.finetune`."""
