"""The covariance-weighted correction: second moments of layers' inputs, and files of them."""
