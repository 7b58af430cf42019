"""``python -m hf_ssl.cli``, which is also what ``accelerate launch -m hf_ssl.cli`` runs."""

import sys

from . import main

sys.exit(main())
