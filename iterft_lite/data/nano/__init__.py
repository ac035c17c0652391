"""The embedded nano models: small enough for a laptop, real enough to be finetuned. See CARD.md."""

from __future__ import annotations

from pathlib import Path

FOLDERS = {"nano": Path(__file__).parent / "chat", "nano-base": Path(__file__).parent / "base"}
"""The models' Hugging Face folders, by the name that recipes use."""
