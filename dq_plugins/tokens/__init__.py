"""Tokens of a text embedding that are the same for every prompt and far larger than the rest: found, and kept exact."""

from dq_plugins.tokens.exact import SECTION, ExactTokens, exact_tokens, install_tokens, tokens_section
from dq_plugins.tokens.outliers import OutlierTokens, TokenStatistics, find_outliers

__all__ = [
    "SECTION",
    "ExactTokens",
    "OutlierTokens",
    "TokenStatistics",
    "exact_tokens",
    "find_outliers",
    "install_tokens",
    "tokens_section",
]
