"""For the site: the hidden argument of rules, `at`, is not shown in their signatures."""

import griffe


class HideAt(griffe.Extension):
    """Removes the argument from every function that has it."""

    def on_function(self, *, func: griffe.Function, **_: object) -> None:
        """Called for each function that was read."""
        if "at" in func.parameters and func.is_public:
            del func.parameters["at"]
