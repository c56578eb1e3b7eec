"""The Pharmacist selector. The way of a pool's row through it, by module:

- `selector`: reads the row's last request and answer, by words and a model's hidden states (`readers`).
- `references`: the six classes that a row may belong to, and rows of each: given ones, and ones made from them, with
  damaged answers (`corruptions`) or answers to other requests (`echo`).
- `questions`: the four questions whose answers make a class.
- `evidence`: learns from references and labels to answer the questions, and answers them for the row; whether its
  request is harmful is learned from the pool's own answers too (`requests`).
- `distance`: how far the pool lies from the references, and so how far the answers are trusted.
- `verdict`: from answers to the row's score and reason, and warnings about the ranking.
- `twins`: optional; two adapters that learn from the pool, and whose losses of the row order the best rows.
"""
