"""`python -m peft_himerge` is `himerge`."""

from .cli import main

if __name__ == "__main__":
    main()
