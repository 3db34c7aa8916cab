"""`python -m mimdet` is the `mimdet` command."""

from mimdet.cli import main
from mimdet.training.signals import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    main()
