"""Bench a pack on a model of the Hugging Face hub, quantized to 4 bit here, as on a phone.

    python examples/bench_hub_model.py runs/demo/pack HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/bench_hub_model.py PACK OWNER/NAME iphone-8gb

The pack must be made for a model of the same shapes. Without a network, and without the model in
the hub's cache, it ends in one line.
"""

import sys

from d2c_mlx import D2CError, PhoneConfig, bench_phone
from d2c_mlx.phone.tables import render_phone


def main(pack: str, model: str, device: str = "iphone-6gb") -> None:
    """Measure and print the table."""
    # Short prompts: the defaults are 1024, 4096 and 8192 tokens.
    config = PhoneConfig(
        packs=(pack,), device=device, model=model, bits=("4",), contexts=(128,), decode=16
    )
    print(render_phone(bench_phone(config)))


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except D2CError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
