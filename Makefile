# `make` checks a change; `make help` lists the rest. CI runs .ci/run.

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
FUZZTIME ?= 60s
CHAOS ?= 10m
BIN := bin
TOOL := go tool -modfile=tools/go.mod

.DEFAULT_GOAL := check
.PHONY: check help fmt lint test race browser pictures generate build bench fuzz govulncheck soak chaos deploy ci demo clean

check: fmt lint test ## fmt, lint and test: what to run before a commit

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-11s %s\n", $$1, $$2}'

fmt: ## format the code and group its imports
	$(TOOL) golangci-lint fmt

lint: ## golangci-lint, as CI runs it
	$(TOOL) golangci-lint run ./...

test: ## the tests, with the short forms of chaos and soak
	go test ./...

race: ## the tests as CI runs them
	go test -race -shuffle=on ./...

browser: ## the page in Chromium, with axe-core from npm
	./.ci/run browser

pictures: ## the screenshots of docs/page
	cd test/browser && npm ci --no-audit --no-fund --ignore-scripts && go test -count=1 -run Picture -update ./...

generate: ## Go code from the protobuf schemas, and the API's OpenAPI document from its types
	$(TOOL) buf generate
	go test ./internal/ui/api -run TestDocument -update

build: ## bin/avatarworker: static, with its version
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w -X main.version=$(VERSION)' -o $(BIN)/avatarworker ./cmd/worker

bench: ## the side-by-side harness of bench/ (see docs/performance.md)
	cd bench && go run . $(ARGS)

fuzz: ## each fuzz target for FUZZTIME (60s)
	@set -e; for pkg in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz' || true); do \
			echo "$$pkg $$target"; go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$pkg; \
		done; done

govulncheck: ## known vulnerabilities in what the program calls; asks vuln.go.dev
	$(TOOL) govulncheck ./...

soak: ## 100,000 short sessions: memory and goroutines
	cd bench && go run . -soak 100000

chaos: ## the long form of the chaos test for CHAOS (10m)
	AVATAR_CHAOS=$(CHAOS) go test -count=1 -timeout 2h -run Chaos -v ./...

deploy: ## rules, chart and unit checked by their own tools
	./.ci/run promtool helm systemd

ci: ## everything CI runs
	./.ci/run

demo: ## a worker, NATS and a simulated backend in one process
	go run ./cmd/worker demo

clean: ## what the targets above made
	rm -rf $(BIN)
