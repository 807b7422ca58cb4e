"""Where the tests find the product, its demo, and the goldens."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
FINETUNE = ROOT / "finetune"
BENCHMARKS = ROOT / "benchmarks"
SUPPORT = TESTS / "support"
LAYOUTS = ROOT / "demo" / "layouts"
GOLDENS = TESTS / "goldens"
IMAGES = GOLDENS / "images"
