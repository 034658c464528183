"""norm_linear on every published shape: `python bench/norm_linear.py --batch 1,8 --threads 2 --out bench/results`."""

from _ops import command

if __name__ == "__main__":
    command("norm_linear")
