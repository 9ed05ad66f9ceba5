"""What checks stand on: rigs that run functions, op cases, caches, engines and meshes on a backend; paired times."""
