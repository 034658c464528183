"""ragged_attention on every published shape: `python bench/ragged_attention.py --batch 1,8 --out bench/results`."""

from _ops import command

if __name__ == "__main__":
    command("ragged_attention")
