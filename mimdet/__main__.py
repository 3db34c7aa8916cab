"""`python -m mimdet` is the `mimdet` command."""

import os

if __name__ == "__main__":
    # Before PyTorch loads: DistributedDataParallel would say, once in every process, that it looked
    # for unused parameters and found none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from mimdet.cli import main

    main()
