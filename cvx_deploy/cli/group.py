"""The command that all others hang on."""

import click

from cvx_deploy import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="cvx-deploy")
@click.option("--debug", is_flag=True, help="Show tracebacks, and what libraries warn of. CVX_DEBUG=1 does the same.")
def cli(debug: bool) -> None:
    """Take CogVideoX from a checkpoint to a video without PyTorch at run time.

    \b
    Try it without a download, on a miniature that comes with the package:
      cvx-deploy run --prompt "a red circle moves to the right" --output circle.mp4
    """
