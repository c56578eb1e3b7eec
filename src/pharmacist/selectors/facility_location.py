"""Facility location: rows that stand for as many others as they can."""

from pharmacist.selectors.cover import Coverage


class FacilityLocation(Coverage):
    """Prefers, one after the other, the row that brings the pool nearest to the rows selected so far.

    The score is what it adds to those before it. Nearness is the cosine on a scale from 0 to 1; geometry alone counts.
    """

    cover = "facility-location"
    paper = "Nemhauser et al. 1978; for training data: Wei et al. 2015, PMLR 37"
