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
