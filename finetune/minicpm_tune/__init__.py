"""Fine-tune MiniCPM-V and InternLM-XComposer2 models."""

__version__ = "0.2.0"
