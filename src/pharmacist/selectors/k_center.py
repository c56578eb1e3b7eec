"""k-center: rows that leave no row far from a selected one."""

from pharmacist.selectors.cover import Coverage


class KCenter(Coverage):
    """Prefers, one after the other, the row farthest from all before it; the score is its distance from those.

    Looks at geometry alone: outliers, damaged rows among them, come early.
    """

    cover = "k-center"
    paper = "Gonzalez 1985; as core sets: Sener and Savarese 2018, arXiv 1708.00489"
