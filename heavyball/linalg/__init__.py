"""Linear algebra of the matrix methods: bases, factors, roots, and when to renew them."""
