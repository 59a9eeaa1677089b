from lib import options  # noqa: F401  # for its --help
