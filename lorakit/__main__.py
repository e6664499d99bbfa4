"""``python -m lorakit``, which ``accelerate launch -m lorakit`` starts too."""

from lorakit.cli import main

main()
