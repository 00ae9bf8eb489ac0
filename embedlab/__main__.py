"""`python -m embedlab` is the command `embedlab`."""

from embedlab.cli import main

raise SystemExit(main())
