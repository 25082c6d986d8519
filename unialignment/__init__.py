"""UniAlignment (arXiv 2509.23760), a second system that reuses Dream Engine's modules."""


def __getattr__(name):
    if name != "UniAlignment":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unialignment.model import UniAlignment  # only now, because it takes seconds

    return UniAlignment
