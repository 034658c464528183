"""fused_mlp on every published shape: `python bench/fused_mlp.py --batch 1,8 --threads 2 --out bench/results`."""

from _ops import command

if __name__ == "__main__":
    command("fused_mlp")
