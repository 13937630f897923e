"""What methods without image-only projections have in common."""

from tokendrop.roles import Separate


class TextProjections:
    """A method under which image tokens use the text's projections."""

    @property
    def separate(self) -> Separate:
        """None of their own. A ClassVar would not satisfy the protocol for pyright."""
        return "none"
