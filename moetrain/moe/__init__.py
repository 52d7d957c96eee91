"""The Mixture-of-Experts layer, four rooms in this order: router, dispatch, experts, combine."""
