"""``python -m cvx_deploy`` is ``cvx-deploy``."""

from cvx_deploy.cli import main

main()
