"""The engine that all operators share: a head's softmax over one row chunk after the other."""
