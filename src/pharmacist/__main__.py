"""``python -m pharmacist``."""

from pharmacist.cli.main import main


raise SystemExit(main())
