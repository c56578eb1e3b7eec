"""Evidence classes: a row is kept if it looks like a good refusal and like none of the ways to be worthless."""
