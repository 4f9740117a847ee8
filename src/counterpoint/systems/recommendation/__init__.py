"""Systems that recommend items: to a user by a history, or to complete a set."""
