"""Floor 0: trees and names, random keys, dtypes, errors."""
