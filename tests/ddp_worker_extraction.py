"""`embedlab embed` with parts of three images; started again by Lightning for every process."""

import sys

from embedlab.cli import main
from embedlab.retrieval import extraction

extraction.ROWS = 3

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
