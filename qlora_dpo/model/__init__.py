"""From the recipe to a trainable model: device, model source, quantized base, LoRA adapter, attention and memory."""
