"""The steps of action.yml, and a program that runs them as GitHub's runner would."""
