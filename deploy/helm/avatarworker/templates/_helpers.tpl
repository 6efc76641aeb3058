{{- define "avatarworker.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "avatarworker.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "avatarworker.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "avatarworker.selector" -}}
app.kubernetes.io/name: {{ include "avatarworker.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "avatarworker.labels" -}}
{{ include "avatarworker.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "avatarworker.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "avatarworker.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "avatarworker.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* The secret with the API key: the given one, our own, or none. */ -}}
{{- define "avatarworker.apiKeySecret" -}}
{{- if .Values.app.apiKey.existingSecret -}}
{{- .Values.app.apiKey.existingSecret -}}
{{- else if .Values.app.apiKey.value -}}
{{- include "avatarworker.fullname" . -}}
{{- end -}}
{{- end -}}

{{- /* The URLs of the config that hold a secret (a user, a token, a query), by
environment variable, as JSON. They belong in a Secret. */ -}}
{{- define "avatarworker.secretURLs" -}}
{{- $urls := dict -}}
{{- range $variable, $path := dict "AVATAR_NATS_URL" (list "nats" "url") "AVATAR_BACKEND_CONSOLE_URL" (list "backend" "console_url") "AVATAR_BACKEND_INGRESS_URL" (list "backend" "ingress_url") "AVATAR_BACKEND_BOOTSTRAP_URL" (list "backend" "bootstrap_url") -}}
{{- $url := dig (first $path) (last $path) "" $.Values.config | toString -}}
{{- if regexMatch "[@?#]" $url -}}
{{- $_ := set $urls $variable $url -}}
{{- end -}}
{{- end -}}
{{- $urls | toJson -}}
{{- end -}}

{{- /* The config without those URLs. */ -}}
{{- define "avatarworker.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $urls := include "avatarworker.secretURLs" . | fromJson -}}
{{- if hasKey $urls "AVATAR_NATS_URL" }}{{ $_ := unset $config.nats "url" }}{{ end -}}
{{- if hasKey $urls "AVATAR_BACKEND_CONSOLE_URL" }}{{ $_ := unset $config.backend "console_url" }}{{ end -}}
{{- if hasKey $urls "AVATAR_BACKEND_INGRESS_URL" }}{{ $_ := unset $config.backend "ingress_url" }}{{ end -}}
{{- if hasKey $urls "AVATAR_BACKEND_BOOTSTRAP_URL" }}{{ $_ := unset $config.backend "bootstrap_url" }}{{ end -}}
{{- toYaml $config -}}
{{- end -}}

{{- /* Names by which Prometheus and others in the cluster may ask the admin port. */ -}}
{{- define "avatarworker.adminHosts" -}}
{{- $name := include "avatarworker.fullname" . -}}
{{- $hosts := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) (printf "%s.%s.svc.cluster.local" $name .Release.Namespace) -}}
{{- concat $hosts (dig "admin" "hosts" list .Values.config) | uniq | join "," -}}
{{- end -}}

{{- /* Seconds of a duration such as 1h30m, 5m or 90s. */ -}}
{{- define "avatarworker.seconds" -}}
{{- $h := regexFind "[0-9]+h" . | trimSuffix "h" | default "0" | int -}}
{{- $m := regexFind "[0-9]+m" . | trimSuffix "m" | default "0" | int -}}
{{- $s := regexFind "[0-9]+s" . | trimSuffix "s" | default "0" | int -}}
{{- add (mul $h 3600) (mul $m 60) $s -}}
{{- end -}}

{{- define "avatarworker.gracePeriod" -}}
{{- add (include "avatarworker.seconds" (toString .Values.config.worker.drain_timeout) | int) .Values.terminationMargin -}}
{{- end -}}

{{- /* Names of the queues: an entry is a name, or a name with a weight. */ -}}
{{- define "avatarworker.queues" -}}
{{- $names := list -}}
{{- range default (list "default") .Values.config.worker.queues -}}
{{- $names = append $names (ternary (get (ternary . dict (kindIs "map" .)) "name") . (kindIs "map" .)) -}}
{{- end -}}
{{- $names | toJson -}}
{{- end -}}
