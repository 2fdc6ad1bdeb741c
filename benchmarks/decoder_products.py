"""Products of a few rows with one weight on a CPU, in each form that answers are decoded with.

    python benchmarks/decoder_products.py 896 9728     # width of the input and of the output

As many weights as do not fit into a cache are multiplied in turn. "packed" is what is chosen for many rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import bitsandbytes as bnb
import torch
from torch import nn

from qlora_dpo.model.quantized import compute_with_dequantized_weights
from qlora_dpo.talk.decoder_products import Product, fused_product

WEIGHT_BYTES = 200e6
"""Of all weights in float32, more than a processor's cache holds."""
MANY_ROWS = 100


def main() -> None:
    """Measure and print a row of a table for each number of rows: milliseconds of a product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=int)
    parser.add_argument("outputs", type=int)
    parser.add_argument("--rows", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    count = max(1, int(WEIGHT_BYTES / (4 * asked.inputs * asked.outputs)))
    dense = [nn.Linear(asked.inputs, asked.outputs, bias=False).requires_grad_(False) for _ in range(count)]
    forms: dict[str, Callable[[], list[Product]]] = {
        "float32": lambda: products(dense, 1, torch.float32),
        "float32, packed": lambda: products(dense, MANY_ROWS, torch.float32),
        "bf16": lambda: products(dense, 1, torch.bfloat16),
        "bf16, packed": lambda: products(dense, MANY_ROWS, torch.bfloat16),
        "NF4": lambda: products([in_nf4(layer) for layer in dense], 1, torch.bfloat16),
    }
    rows = [int(number) for number in asked.rows.split(",")]
    seconds = {name: [measure(form(), count, asked) for count in rows] for name, form in forms.items()}
    print(f"{asked.inputs} to {asked.outputs}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"bitsandbytes {bnb.__version__}; medians of {asked.rounds} rounds, in ms")
    print(f"| rows | {' | '.join(seconds)} |")
    for index, number in enumerate(rows):
        print(f"| {number} | {' | '.join(f'{1000 * of_form[index]:.2f}' for of_form in seconds.values())} |")


def products(layers: Sequence[nn.Module], rows: int, dtype: torch.dtype) -> list[Product]:
    """A product for each layer, as it is chosen for so many rows."""
    return [fused_product([layer], rows, dtype) for layer in layers]


def in_nf4(dense: nn.Linear) -> nn.Module:
    """The layer in NF4, as a base is loaded."""
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, False, torch.float32)
    layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    compute_with_dequantized_weights(nn.Sequential(layer))
    return layer


@torch.inference_mode()
def measure(built: Sequence[Product], rows: int, asked: argparse.Namespace) -> float:
    """Seconds of one product with so many rows, the median of all rounds but a first one that warms up."""
    inputs, seconds = torch.randn(rows, asked.inputs), []
    for _ in range(asked.rounds + 1):
        started = time.perf_counter()
        for product in built:
            product(inputs)
        seconds.append((time.perf_counter() - started) / len(built))
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
