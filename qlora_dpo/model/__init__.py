"""From a name in a recipe to a model that can be trained: device, source, 4-bit base, adapter."""
