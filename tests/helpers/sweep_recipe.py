"""A recipe of four steps for sweeps."""

RECIPE = """
[model]
name = "./base"
dtype = "fp32"
[lora]
r = 4
[data]
train = "./train.jsonl"
eval = "./held.jsonl"
[train]
batch_size = 4
learning_rate = 0.01
num_train_epochs = 2
[samples]
prompts = 1
max_new_tokens = 2
"""
