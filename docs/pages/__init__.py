"""The pages and tables of the documentation that follow from the code and from kept results."""
