"""Ridge that several tests use."""

import numpy as np


class Ridge:
    """Lower level: weighted least squares with a ridge; upper level: least squares on other data; in closed form."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.x, self.u = rng.normal(size=(12, 4)), rng.normal(size=(9, 4))
        self.y, self.v = rng.normal(size=12), self.u @ rng.normal(size=4)
        self.sigma = np.exp(rng.normal(size=12))
        self.sigma /= self.sigma.mean()
        self.eye = 0.3 * np.eye(4)

    def losses(self, theta: np.ndarray) -> np.ndarray:
        return 0.5 * (self.x @ theta - self.y) ** 2

    def solve(self, penalty: float, sigma: np.ndarray | None = None, upper: float = 1.0) -> np.ndarray:
        """argmin upper * U + penalty * W."""
        s = self.sigma if sigma is None else sigma
        left = penalty * ((self.x * s[:, None]).T @ self.x / 12 + self.eye) + upper * self.u.T @ self.u / 9
        right = penalty * (self.x * s[:, None]).T @ self.y / 12 + upper * self.u.T @ self.v / 9
        return np.linalg.solve(left, right)

    def upper(self, theta: np.ndarray) -> float:
        return 0.5 * float(((self.u @ theta - self.v) ** 2).mean())

    def hypergradient(self) -> np.ndarray:
        """dU(theta*(w))/dw by central differences over the exactly solved lower level."""
        w, eps = np.log(self.sigma), 1e-5

        def value(w: np.ndarray) -> float:
            sigma = np.exp(w) / np.exp(w).mean()
            return self.upper(self.solve(1.0, sigma, upper=0.0))

        return np.array([(value(w + eps * e) - value(w - eps * e)) / (2 * eps) for e in np.eye(12)])
