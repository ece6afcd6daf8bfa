"""The command line."""

from graft.cli.commands import app as app
from graft.cli.commands import main as main
